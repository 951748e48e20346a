"""Which programs would read the rope of a config.json wrongly, and what they would do instead.

A table of rules. `run` in a rule's source: seen by running that version; `read`: seen in its source code. Programs change: the
versions are part of the statement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mcore_longctx.rope.frequencies import temperature

__all__ = ["Misreading", "misreadings"]

_MEGATRON_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_KNOWN = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")  # to transformers


@dataclass(frozen=True)
class Misreading:
    """One program that would read a rope wrongly, or not at all."""

    program: str
    does: str
    source: str

    def describe(self) -> str:
        """One line."""
        return f"{self.program}: {self.does} [{self.source}]"


@dataclass(frozen=True)
class _Spelled:
    """The rope of a config.json as it is spelled. Nothing is checked here: odd files are what the rules are about."""

    config: Mapping[str, Any]
    settings: Mapping[str, Any]  # of rope_scaling, else of rope_parameters, as transformers 4 and 5 choose

    @property
    def type(self) -> object:
        return self.settings.get("rope_type", self.settings.get("type", "default"))

    @property
    def factor(self) -> float:
        return self.number("factor", 1.0)

    @property
    def is_scaled(self) -> bool:
        return self.type != "default"

    @property
    def scaling_is_only_new(self) -> bool:
        """The scaling stands in `rope_parameters` alone."""
        return self.is_scaled and not _section(self.config, "rope_scaling")

    @property
    def base_is_inside_only(self) -> bool:
        """The base stands in the rope settings alone, and is not the one that transformers takes for a missing one."""
        return "rope_theta" not in self.config and self.number("rope_theta", 10_000.0) != 10_000.0

    @property
    def spellings_differ(self) -> bool:
        old, new = (_comparable(self.config, name) for name in ("rope_scaling", "rope_parameters"))
        return bool(old) and bool(new) and old != new

    def number(self, key: str, default: float) -> float:
        return _number(self.settings.get(key), default)

    def has(self, key: str) -> bool:
        return self.settings.get(key) is not None

    @property
    def has_other_top_level_original(self) -> bool:
        outer = self.config.get("original_max_position_embeddings")
        return outer is not None and outer != self.settings.get("original_max_position_embeddings")

    @property
    def has_own_attention_factor(self) -> bool:
        """An attention factor that is not the one that follows from the factor."""
        return self.has("attention_factor") and abs(self.number("attention_factor", 1.0) - temperature(self.factor)) > 1e-6

    @property
    def has_effective_mscale(self) -> bool:
        """A pair that transformers heeds (both above 0) and that changes the attention factor."""
        pair = self.number("mscale", 0.0), self.number("mscale_all_dim", 0.0)
        return min(pair) > 0 and temperature(self.factor, pair[0]) / temperature(self.factor, pair[1]) != temperature(self.factor)

    @property
    def has_mscale_of_zero(self) -> bool:
        """A pair that transformers ignores and others use."""
        return (
            self.has("mscale")
            and self.has("mscale_all_dim")
            and 0.0 in (self.settings["mscale"], self.settings["mscale_all_dim"])
        )

    @property
    def temperature_of_lengths(self) -> float:
        """What vLLM and SGLang multiply cos and sin by under longrope: it follows from the two lengths."""
        length = _number(self.config.get("max_position_embeddings"), 0.0)
        original = _number(
            self.config.get("original_max_position_embeddings"), self.number("original_max_position_embeddings", length)
        )
        return math.sqrt(1 + math.log(length / original) / math.log(original)) if 1 < original < length else 1.0

    @property
    def has_other_longrope_temperature(self) -> bool:
        """An attention factor that is not the one of the lengths, and no mscale, which servers would heed."""
        differs = abs(self.number("attention_factor", 1.0) - self.temperature_of_lengths) > 1e-6
        return self.has("attention_factor") and differs and not (self.has("short_mscale") or self.has("long_mscale"))

    @property
    def is_llama_31(self) -> bool:
        """Has the bounds that Megatron's llama3 has built in."""
        return all(self.settings.get(key) == value for key, value in _MEGATRON_LLAMA3.items())


def _number(value: object, default: float) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e100:  # false for NaN
        return float(value)
    return default


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _comparable(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One spelling with its type and base by the same names, empty where it is missing."""
    section = {key: value for key, value in _section(config, name).items() if value is not None}
    if not section:
        return {}
    rope_type = section.pop("type", "default")
    return {"rope_type": rope_type, "rope_theta": config.get("rope_theta"), **section}


@dataclass(frozen=True)
class _Rule:
    program: str
    type: str | None  # None: any
    when: Callable[[_Spelled], bool]
    does: str
    source: str


_T4, _T5 = "transformers 4", "transformers 5"
_VLLM, _SGLANG, _LLAMA_CPP = "vLLM", "SGLang", "llama.cpp"
_MEGATRON, _BRIDGE, _MBRIDGE = "Megatron-LM", "Megatron-Bridge", "mbridge"
_RUN_4, _RUN_5 = "transformers 4.57.6, run", "transformers 5.23.0, run"
_READ_VLLM, _READ_SGLANG = "vLLM 0.33.0, read", "SGLang 0.5.23, read"
_READ_CPP = "llama.cpp of llama-cpp-python 0.3.36, read"
_READ_MEGATRON = "megatron-core 0.16.1 to 0.19.2, run; Megatron-LM d98e8a6, read"
_RUN_YARN = "megatron-core yarn_rotary_pos_embedding.py, 0.16.1 to 0.19.2, run"
_READ_BRIDGE = "Megatron-Bridge 0.6.2 and 067f987 models/llama/llama_bridge.py, read"

# fmt: off
_RULES = (
    # what transformers makes of it, and with it vLLM, evaluation harnesses, nearly everybody
    _Rule(_T4, None, lambda rope: rope.scaling_is_only_new,
          "takes no scaling, silently: it stands in rope_parameters, which it does not know", _RUN_4),
    _Rule(_T4, None, lambda rope: rope.base_is_inside_only,
          "takes base 10,000: it ignores a rope_theta inside the rope settings", _RUN_4),
    _Rule(_T4, None, lambda rope: rope.spellings_differ, "takes rope_scaling, silently; rope_parameters says otherwise", _RUN_4),
    _Rule(_T5, None, lambda rope: rope.spellings_differ, "takes rope_scaling, silently; rope_parameters says otherwise", _RUN_5),
    _Rule(_T4, None, lambda rope: rope.type not in _KNOWN, "stops with a KeyError: the type is unknown", _RUN_4),
    _Rule(_T5, None, lambda rope: rope.type not in _KNOWN, "stops with a KeyError: the type is unknown", _RUN_5),
    _Rule(_T5, None, lambda rope: rope.type in ("yarn", "llama3") and rope.has_other_top_level_original,
          "takes original_max_position_embeddings from the top level, silently", _RUN_5),
    _Rule(_VLLM, None, lambda rope: rope.type in ("yarn", "llama3") and rope.has_other_top_level_original,
          "takes original_max_position_embeddings from the top level", _READ_VLLM),
    _Rule(_SGLANG, None, lambda rope: rope.type in ("yarn", "llama3") and rope.has_other_top_level_original,
          "takes original_max_position_embeddings from the top level", _READ_SGLANG),
    # yarn
    _Rule(_T4, "yarn", lambda rope: not rope.has("original_max_position_embeddings"),
          "counts the ramp from max_position_embeddings: another model, with a warning", _RUN_4),
    _Rule(_T5, "yarn", lambda rope: not rope.has("original_max_position_embeddings"),
          "counts the ramp from max_position_embeddings: another model, silently", _RUN_5),
    _Rule(_SGLANG, "yarn", lambda rope: not rope.has("original_max_position_embeddings"),
          "multiplies max_position_embeddings by factor {factor:g}: it would serve positions beyond the table", _READ_SGLANG),
    _Rule(_T4, "yarn", lambda rope: "truncate" in rope.settings and not rope.has("truncate"),
          "does not round the ramp, the opposite of leaving truncate out", _RUN_4),
    _Rule(_T5, "yarn", lambda rope: "truncate" in rope.settings and not rope.has("truncate"),
          "does not round the ramp, the opposite of leaving truncate out", _RUN_5),
    _Rule("older vLLM", "yarn", lambda rope: rope.has_own_attention_factor or rope.has_effective_mscale,
          "drops attention_factor and mscale: cos and sin times {temperature:.6g}", "vLLM 07b12f1, read"),
    _Rule(_SGLANG, "yarn", lambda rope: rope.has_own_attention_factor,
          "drops attention_factor: cos and sin times {temperature:.6g}", _READ_SGLANG),
    _Rule(_SGLANG, "yarn", lambda rope: rope.has_mscale_of_zero,
          "uses the mscale pair also where one is 0, which transformers ignores", _READ_SGLANG),
    _Rule(_LLAMA_CPP, "yarn", lambda rope: rope.settings.get("truncate") is False,
          "rounds the ramp: truncate false is dropped", _READ_CPP),
    _Rule(_LLAMA_CPP, "yarn", lambda rope: rope.has_own_attention_factor,
          "overwrites attention_factor when it loads: cos and sin times {temperature:.6g}", _READ_CPP),
    _Rule(_LLAMA_CPP, "yarn", lambda rope: rope.has_effective_mscale,
          "drops the mscale pair: cos and sin times {temperature:.6g}", _READ_CPP),
    _Rule(_MEGATRON, "yarn", lambda rope: rope.has_own_attention_factor,
          "has no attention_factor: the same needs --mscale and --mscale-all-dim", _RUN_YARN),
    _Rule(_MEGATRON, "yarn", lambda rope: rope.has_mscale_of_zero,
          "uses the mscale pair also where one is 0, which transformers ignores", _RUN_YARN),
    _Rule(_MEGATRON, "yarn", lambda rope: True,
          "takes factor 1 and original length 4096 where --rotary-scaling-factor and --yarn-original-max-position-embeddings are forgotten,"
          " silently; a checkpoint does not hold them", _READ_MEGATRON),
    _Rule(_BRIDGE, "yarn", lambda rope: rope.has_own_attention_factor, "drops attention_factor", _READ_BRIDGE),
    _Rule(_BRIDGE, "yarn", lambda rope: not (rope.has("beta_fast") and rope.has("beta_slow")),
          "stops with a TypeError: it takes a missing beta for None", _READ_BRIDGE),
    _Rule(_BRIDGE, "yarn", lambda rope: not rope.has("truncate"),
          "does not round the ramp: it takes a missing truncate for None", "Megatron-Bridge 0.6.2, run on the function"),
    _Rule(_BRIDGE, "yarn", lambda rope: True,
          "stops with \"cannot map\" in its newer Llama path, which has no yarn", "Megatron-Bridge 067f987, read"),
    # llama3
    _Rule(_T4, "llama3", lambda rope: not rope.has("original_max_position_embeddings"), "stops with a KeyError", _RUN_4),
    _Rule(_T5, "llama3", lambda rope: not rope.has("original_max_position_embeddings"),
          "counts the ramp from max_position_embeddings: another model", _RUN_5),
    _Rule(_SGLANG, "llama3", lambda rope: not all(rope.has(key) for key in _MEGATRON_LLAMA3),
          "takes low 1, high 4 and max_position_embeddings for what is missing, with a line in its log", _READ_SGLANG),
    _Rule(_LLAMA_CPP, "llama3", lambda rope: not all(rope.has(key) for key in _MEGATRON_LLAMA3),
          "takes low 1, high 4 and 8192 for what is missing", _READ_CPP),
    _Rule(_T4, "llama3", lambda rope: rope.has("attention_factor"), "ignores attention_factor, with a warning", _RUN_4),
    _Rule(_T5, "llama3", lambda rope: rope.has("attention_factor"), "ignores attention_factor, with a warning", _RUN_5),
    _Rule(_MEGATRON, "llama3", lambda rope: not rope.is_llama_31,
          "has low 1, high 4 and 8192 built in: another ramp", "megatron-core rotary_pos_embedding.py, 0.16.1 to 0.19.2, run"),
    _Rule(_MEGATRON, "llama3", lambda rope: rope.factor != 8,
          "trains with factor 8: stock pretrain_gpt.py drops --rope-scaling-factor", _READ_MEGATRON),
    _Rule(_MEGATRON, "llama3", lambda rope: True,
          "loads a checkpoint unscaled unless --use-rope-scaling is repeated; --use-checkpoint-args does not restore it", _READ_MEGATRON),
    _Rule(_BRIDGE, "llama3", lambda rope: not rope.is_llama_31,
          "reads factor alone, and takes and exports low 1, high 4 and 8192", _READ_BRIDGE),
    # linear, dynamic, and what is not scaled
    _Rule(_VLLM, "linear", lambda rope: rope.config.get("max_position_embeddings", 0) == rope.factor * rope.number("original_max_position_embeddings", -1),
          "multiplies max_position_embeddings, which holds the scaled length already, by {factor:g}", "vLLM 0.33.0, its function run"),
    _Rule(_SGLANG, "linear", lambda rope: rope.has("original_max_position_embeddings"),
          "takes max_position_embeddings for the length: with original_max_position_embeddings there it does not multiply",
          "SGLang 0.5.23, its function run"),
    _Rule(_MEGATRON, "linear", lambda rope: not rope.factor.is_integer(),
          "cannot be told: --rotary-seq-len-interpolation-factor is a whole number", _READ_MEGATRON),
    _Rule("older Megatron-Bridge", "linear", lambda rope: True, "drops linear scaling before 2026-07, silently", "Megatron-Bridge 0.3.1, read"),
    _Rule(_BRIDGE, "dynamic", lambda rope: True, "takes no scaling, silently", _READ_BRIDGE),
    _Rule(_MEGATRON, "dynamic", lambda rope: True, "has no such rope", _READ_MEGATRON),
    _Rule(_VLLM, "longrope", lambda rope: rope.has_other_longrope_temperature,
          "drops attention_factor: cos and sin times {temperature_of_lengths:.6g}, by the two lengths", "vLLM 17d618b, read"),
    _Rule(_SGLANG, "longrope", lambda rope: rope.has_other_longrope_temperature,
          "drops attention_factor: cos and sin times {temperature_of_lengths:.6g}, by the two lengths", "SGLang 0b1fd02, read"),
    _Rule(_LLAMA_CPP, "longrope", lambda rope: True,
          "drops both lists of a Llama model when it is converted", "llama.cpp 0274f0f conversion/llama.py, read"),
    _Rule(_BRIDGE, "longrope", lambda rope: True, "takes no scaling, silently", _READ_BRIDGE),
    _Rule(_MEGATRON, "longrope", lambda rope: True, "has no such rope", _READ_MEGATRON),
    _Rule(_MEGATRON, None, lambda rope: isinstance(base := rope.config.get("rope_theta"), float) and not base.is_integer(),
          "cannot be told the base: --rotary-base is a whole number", _READ_MEGATRON),
    _Rule(_MBRIDGE, None, lambda rope: rope.is_scaled and rope.type != "linear",
          "makes it linear interpolation by {factor:g}, silently (with transformers 4; with 5 it stops)",
          "mbridge 0.15.1, run; ISEEKYAN/mbridge@10cb17f, read"),
    _Rule(_VLLM, None, lambda rope: rope.type not in (*_KNOWN, "ntk", "mrope", "deepseek_yarn"), "stops: the type is unknown", _READ_VLLM),
    _Rule(_SGLANG, None, lambda rope: rope.type not in (*_KNOWN, "mrope", "deepseek_yarn"), "stops: the type is unknown", _READ_SGLANG),
    _Rule(_LLAMA_CPP, None, lambda rope: rope.type not in _KNOWN, "takes no scaling, with a warning", _READ_CPP),
)
# fmt: on


def misreadings(config: Mapping[str, Any]) -> list[Misreading]:
    """Every program known to read the rope of this config.json otherwise than it is meant, in the order of the table.

    `config` may also be one that `read_hf_rope` refuses.

    >>> [found.program for found in misreadings({"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}})]
    ['transformers 4']
    """
    rope = _Spelled(config, _section(config, "rope_scaling") or _section(config, "rope_parameters"))
    numbers = {
        "factor": rope.factor,
        "temperature": temperature(rope.factor),
        "temperature_of_lengths": rope.temperature_of_lengths,
    }
    return [
        Misreading(rule.program, rule.does.format(**numbers), rule.source)
        for rule in _RULES
        if rule.type in (None, rope.type) and rule.when(rope)
    ]
