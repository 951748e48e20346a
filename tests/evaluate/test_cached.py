"""One prefill and many continuations, on every layout, against transformers' full forward and `generate` in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from mcore_longctx.errors import DataError
from mcore_longctx.evaluate import cached, slices
from mcore_longctx.evaluate.cached import greedy, option_scores, prefill, score_suffix
from mcore_longctx.evaluate.scoring import score_answer
from mcore_longctx.megatron_compat import device_context, training_device
from mcore_longctx.model import LongContextAttention, destroy_process_groups
from mcore_longctx.model.kv_cache import Branch, extend
from mcore_longctx.parallel import past
from mcore_longctx.recipe.schema import Parallel
from tests.model.llama import SHAPE as FOUR_LAYERS
from tests.model.llama import build, hf_llama, megatron_names
from tests.multiproc import run_processes

SHAPE = replace(FOUR_LAYERS, num_layers=2)  # 8 query heads, 4 key heads, 264 tokens padded to 384
TOLERANCE = 1e-10  # float64; only the angles of the rope and their cosines are float32, in transformers and here alike
PROMPTS = (37, 3)  # uneven; shorter than 2 x CP, so that ranks keep no row
SUFFIX, ANSWER_START, NEW = 11, 4, 12
EXCHANGES = ("p2p", "all_gather", "a2a")


def layout(tp: int = 1, cp: int = 1, sp: bool = False, comm: Any = "p2p", sizes: tuple[int, int] | None = None) -> Parallel:
    return Parallel(
        tensor_model_parallel_size=tp,
        context_parallel_size=cp,
        sequence_parallel=sp,
        cp_comm_type=comm,
        hierarchical_context_parallel_sizes=sizes,
    )


TWO_RANKS = [*(layout(cp=2, comm=comm) for comm in EXCHANGES), layout(tp=2), layout(tp=2, sp=True)]
FOUR_RANKS = [
    *(layout(cp=4, comm=comm) for comm in EXCHANGES),
    layout(cp=4, comm=("a2a+p2p", "p2p"), sizes=(2, 2)),
    layout(tp=2, cp=2, sp=True, comm="a2a"),
]


def float64_llama() -> Any:
    """transformers' Llama with nothing below float64 inside but the rope: its own norm and eager softmax go through float32."""
    model = hf_llama(SHAPE).double()
    model.set_attn_implementation("sdpa")
    norms = [(model.model, "norm")]
    norms += [(layer, name) for layer in model.model.layers for name in ("input_layernorm", "post_attention_layernorm")]
    for owner, name in norms:
        norm = torch.nn.RMSNorm(SHAPE.hidden_size, SHAPE.layernorm_epsilon, dtype=torch.float64)
        norm.weight = getattr(owner, name).weight
        setattr(owner, name, norm)
    return model


def generated(hf: Any, tokens: Tensor, count: int) -> Tensor:
    """transformers' own greedy decoding, with its own cache."""
    ones = torch.ones_like(tokens)
    with torch.no_grad():
        out = hf.generate(tokens, attention_mask=ones, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[:, tokens.size(1) :]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, and for each prompt: tokens, suffixes, options and what transformers makes of each of them."""
    hf = float64_llama()
    generator = torch.Generator().manual_seed(11)

    def drawn(*shape: int) -> Tensor:
        return torch.randint(SHAPE.vocab_size, shape, generator=generator)

    def logits(*parts: Tensor) -> Tensor:
        with torch.no_grad():
            return hf(torch.cat(parts)[None]).logits[0]

    cases = []
    for length in PROMPTS:
        prompt, suffixes, options = drawn(length), drawn(3, SUFFIX), [drawn(count) for count in (1, 5, 2)]
        said = generated(hf, torch.cat((prompt, suffixes[0]))[None], 32 if length == PROMPTS[0] else NEW)[0]
        cases.append(
            {
                "prompt": prompt,
                "suffixes": suffixes,
                "logits": [logits(prompt, suffix) for suffix in suffixes],
                "options": [*options, said[:3]],
                "option_logits": [logits(prompt, suffixes[0], option) for option in [*options, said[:3]]],
                "direct_logits": [logits(prompt, option) for option in options],
                "said": said,
                "said_directly": generated(hf, prompt[None], 3)[0],
            }
        )
    file = tmp_path_factory.mktemp("oracle") / "oracle.pt"
    torch.save({"weights": megatron_names(dict(hf.state_dict()), SHAPE), "cases": cases}, file)
    return file


def log_probabilities(logits: Tensor, start: int, tokens: Tensor) -> np.ndarray:
    """Of `tokens`, which stand at `start`, float64 [len(tokens)]."""
    rows = logits[start - 1 : start - 1 + len(tokens)].double()
    return rows.log_softmax(-1).gather(1, tokens[:, None])[:, 0].numpy()


def worst(found: Any, expected: Any) -> float:
    return float(np.abs(np.asarray(found, dtype=np.float64) - np.asarray(expected, dtype=np.float64)).max(initial=0))


def differences(model: Any, case: dict[str, Any]) -> tuple[dict[str, float], list[Any]]:
    """Largest difference to transformers of every mode (tokens that differ count as 1), and what must be the same on all ranks."""
    prompt, suffixes = case["prompt"], case["suffixes"]
    length = len(prompt)
    cache = prefill(model, prompt.numpy())
    before = [rows.clone() for layer in cache.layers for rows in layer]
    errors: dict[str, float] = {"first logits": worst(cache.next_logits.cpu(), case["logits"][0][length - 1])}
    same: list[Any] = []

    for number, suffix in enumerate(suffixes):  # several branches of one cache
        score = score_suffix(model, cache, suffix.numpy(), ANSWER_START)
        expected = log_probabilities(case["logits"][number], length + ANSWER_START, suffix[ANSWER_START:])
        errors[f"branch {number}"] = worst(score.log_probability, expected)
        argmax = case["logits"][number][length + ANSWER_START - 1 : -1].argmax(-1)
        errors[f"branch {number}, most probable tokens"] = float((score.got != argmax.numpy()).any())
        same.append((score.got.tolist(), score.log_probability.tolist()))
    errors["answer at once"] = worst(
        score_suffix(model, cache, suffixes[0].numpy(), 0).log_probability,
        log_probabilities(case["logits"][0], length, suffixes[0]),
    )

    options = [option.numpy() for option in case["options"]]
    scores = option_scores(model, cache, suffixes[0].numpy(), options)
    sums = [
        log_probabilities(logits, length + SUFFIX, option).sum()
        for logits, option in zip(case["option_logits"], case["options"], strict=True)
    ]
    errors["options"] = worst([score.log_probability for score in scores], sums)
    errors["options, tokens"] = worst([score.tokens for score in scores], [len(option) for option in options])
    errors["options, greedy"] = float([score.is_greedy for score in scores] != [False, False, False, True])
    direct = option_scores(model, cache, suffixes[0][:0].numpy(), options[:3])
    sums = [log_probabilities(x, length, option).sum() for x, option in zip(case["direct_logits"], case["options"], strict=False)]
    errors["options without a suffix"] = worst([score.log_probability for score in direct], sums)

    said = greedy(model, cache, suffixes[0].numpy(), max_new_tokens=len(case["said"]))
    errors["greedy"] = float(said != case["said"].tolist())
    errors["greedy without a suffix"] = float(
        greedy(model, cache, suffixes[0][:0].numpy(), max_new_tokens=3) != case["said_directly"].tolist()
    )
    same.append((said, scores))

    branch, found = Branch(cache), []  # a branch in steps of 1, 2, 3 ... tokens
    for count in (1, 2, 3, 5):
        tokens = suffixes[1][branch.new_tokens : branch.new_tokens + count].to(training_device())
        found.append(extend(model, branch, tokens, torch.arange(count, device=tokens.device)).cpu())
    errors["a branch in steps"] = worst(torch.cat(found), case["logits"][1][length:])

    whole = torch.cat((prompt, suffixes[0]))
    for end in (len(whole), len(whole) - 1, len(whole) - 2):
        score = score_answer(model, whole[:end].numpy(), length + ANSWER_START)
        expected = log_probabilities(case["logits"][0], length + ANSWER_START, whole[length + ANSWER_START : end])
        errors[f"one forward of {end}"] = worst(score.log_probability, expected)
    after = [rows for layer in cache.layers for rows in layer]
    errors["cache"] = float(not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
    return errors, same


def measure(file: Path, layouts: list[Parallel]) -> tuple[dict[str, float], list[Any]]:
    """Run in each rank: every mode of every prompt in every layout."""
    saved = torch.load(file, weights_only=True)
    errors: dict[str, float] = {}
    same = []
    for parallel in layouts:
        with device_context():
            model = build(parallel, saved["weights"], shape=SHAPE, precision="fp32").double().eval()
        for case in saved["cases"]:
            found, alike = differences(model, case)
            name = f"{parallel.describe()} {parallel.cp_comm_type} sp={parallel.sequence_parallel} {len(case['prompt'])}"
            errors |= {f"{name}: {mode}": error for mode, error in found.items()}
            same.append(alike)
    return errors, same


def assert_equal_to_the_oracle(results: list[tuple[dict[str, float], list[Any]]]) -> None:
    wrong = {
        f"rank {rank}, {name}": error
        for rank, (errors, _) in enumerate(results)
        for name, error in errors.items()
        if not error < TOLERANCE
    }
    assert not wrong, "\n".join(f"{name}: {error:.2e}" for name, error in wrong.items())
    assert all(same == results[0][1] for _, same in results), "ranks found different results"
    assert all(errors for errors, _ in results)


def test_one_process_equals_transformers_in_every_mode(oracle: Path) -> None:
    try:
        assert_equal_to_the_oracle([measure(oracle, [Parallel()])])
    finally:
        destroy_process_groups()


@pytest.mark.multiproc
def test_two_ranks_equal_transformers_in_every_mode_and_layout(oracle: Path) -> None:
    assert_equal_to_the_oracle(run_processes(measure, 2, oracle, TWO_RANKS))


@pytest.mark.multiproc
def test_four_ranks_equal_transformers_in_every_mode_and_layout(oracle: Path) -> None:
    assert_equal_to_the_oracle(run_processes(measure, 4, oracle, FOUR_RANKS))


# ---------------------------------------------------------------------------------------------------------- broken on purpose


def contiguous(length: int, size: int, rank: int) -> np.ndarray:
    return np.arange(length // size * rank, length // size * (rank + 1))


def keeps_padding(self: LongContextAttention, rows: int | None) -> Any:
    return CAPTURING(self, None)


CAPTURING = LongContextAttention.capturing
BREAKS = {
    "rows that are not in zigzag": lambda: mock.patch.object(slices, "zigzag_positions", contiguous),
    "rows of the answer that are not in zigzag": lambda: mock.patch.object(
        slices, "zigzag_owner", lambda position, length, size: divmod(position, length // size)
    ),
    "padding that is kept": lambda: mock.patch.object(LongContextAttention, "capturing", keeps_padding),
    "a merge without weights": lambda: mock.patch.object(
        past, "_merged_stack", lambda out, lse: (out.mean(0), torch.logsumexp(lse, 0))
    ),
    "results of one rank only": lambda: mock.patch.object(past, "_of_all_ranks", lambda query, outs, lses, group: (outs, lses)),
    "branches that are one": lambda: mock.patch.object(Branch, "fork", lambda self: self),
    "a cache that is written to": lambda: mock.patch.object(cached, "Branch", writing_branch),
}


def writing_branch(cache: Any) -> Branch:
    """What a branch must not be: it puts new rows where the prompt's are."""
    for key, value in cache.layers:
        key[:1], value[:1] = 0, 0
    return Branch(cache)


def measure_broken(file: Path) -> dict[str, dict[str, float]]:
    """Run in each of two ranks: the differences of the first prompt with each break, and without one."""
    saved = torch.load(file, weights_only=True)
    case = saved["cases"][0] | {"said": saved["cases"][0]["said"][:3]}
    with device_context():
        model = build(layout(cp=2), saved["weights"], shape=SHAPE).double().eval()
    found = {"nothing": differences(model, case)[0]}
    for name, broken in BREAKS.items():
        with broken():
            found[name] = differences(model, case)[0]
    return found


@pytest.mark.multiproc
def test_what_is_broken_is_seen(oracle: Path) -> None:
    for rank in run_processes(measure_broken, 2, oracle):
        assert not any(error > TOLERANCE for error in rank["nothing"].values())
        seen = {name: {mode for mode, error in errors.items() if error > 1e-3} for name, errors in rank.items()}
        every_branch = {"branch 0", "branch 1", "branch 2", "options", "a branch in steps"}
        for name in (
            "rows that are not in zigzag",
            "padding that is kept",
            "a merge without weights",
            "results of one rank only",
        ):
            assert every_branch <= seen[name], name
        assert {"one forward of 48", "one forward of 46"} <= seen["rows of the answer that are not in zigzag"]
        assert seen["branches that are one"] & every_branch == {"options"}
        assert {"cache", "branch 1"} <= seen["a cache that is written to"]


# --------------------------------------------------------------------------------------------------------------- single process


@pytest.fixture
def model(oracle: Path) -> Any:
    saved = torch.load(oracle, weights_only=True)
    with device_context():
        yield build(Parallel(), saved["weights"], shape=SHAPE).double().eval()
    destroy_process_groups()


def test_teacher_forcing_agrees_with_greedy_decoding_up_to_the_first_miss(model: Any, oracle: Path) -> None:
    case = torch.load(oracle, weights_only=True)["cases"][0]
    cache, question = prefill(model, case["prompt"].numpy()), case["suffixes"][0].numpy()
    said = greedy(model, cache, question, max_new_tokens=NEW)
    for miss in (None, 0, 4, NEW - 1):
        answer = np.array(said)
        if miss is not None:
            answer[miss] = (answer[miss] + 1) % SHAPE.vocab_size
        score = score_suffix(model, cache, np.concatenate((question, answer)), len(question))
        assert bool((score.got == answer).all()) == (said[: len(answer)] == answer.tolist()) == (miss is None)
        reached = NEW if miss is None else miss + 1
        assert score.got[:reached].tolist() == said[:reached]


def test_greedy_decoding_ends_before_a_stop_token(model: Any, oracle: Path) -> None:
    case = torch.load(oracle, weights_only=True)["cases"][0]
    cache, question, said = prefill(model, case["prompt"].numpy()), case["suffixes"][0].numpy(), case["said"].tolist()
    stop = said[5]
    assert greedy(model, cache, question, max_new_tokens=NEW, stop_ids={stop, 263}) == said[: said.index(stop)]
    assert greedy(model, cache, question, max_new_tokens=0) == []


def test_long_suffixes_go_in_pieces(model: Any, oracle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = torch.load(oracle, weights_only=True)["cases"][0]
    cache, suffix = prefill(model, case["prompt"].numpy()), case["suffixes"][0].numpy()
    at_once = score_suffix(model, cache, suffix, 2)
    for pieces in (1, 3, 9):
        monkeypatch.setattr(cached, "_TOKENS_AT_ONCE", pieces)
        found = score_suffix(model, cache, suffix, 2)
        assert found.got.tolist() == at_once.got.tolist()
        assert worst(found.log_probability, at_once.log_probability) < TOLERANCE
        said = greedy(model, cache, suffix, max_new_tokens=3)
        assert said == case["said"][:3].tolist()


def test_bf16_is_as_near_to_float64_as_a_full_forward_in_bf16_is(oracle: Path) -> None:
    saved = torch.load(oracle, weights_only=True)
    case = saved["cases"][0]
    model = build(Parallel(), saved["weights"], shape=SHAPE, precision="bf16").eval()
    try:
        cache, length = prefill(model, case["prompt"].numpy()), len(case["prompt"])
        assert {rows.dtype for layer in cache.layers for rows in layer} == {torch.bfloat16}
        assert cache.next_logits.dtype is torch.float32
        shorter, full = 0.0, 0.0
        for suffix, logits in zip(case["suffixes"], case["logits"], strict=True):
            expected = log_probabilities(logits, length + ANSWER_START, suffix[ANSWER_START:])
            shorter = max(shorter, worst(score_suffix(model, cache, suffix.numpy(), ANSWER_START).log_probability, expected))
            whole = torch.cat((case["prompt"], suffix)).numpy()
            full = max(full, worst(score_answer(model, whole, length + ANSWER_START).log_probability, expected))
        assert 1e-4 < shorter < 2 * full
        assert len(greedy(model, cache, case["suffixes"][0].numpy(), max_new_tokens=3)) == 3
    finally:
        destroy_process_groups()


def test_tokens_that_cannot_be_scored_are_one_line(model: Any, oracle: Path) -> None:
    none, wrong, fine = np.zeros(0, dtype=np.int64), np.array([1, 264]), np.array([1, 2, 3])
    with pytest.raises(DataError, match=r"the prompt has shape \[0\], expected at least 1 token"):
        prefill(model, none)
    with pytest.raises(DataError, match="the prompt holds the token 264, the model's vocabulary is 0 to 263"):
        prefill(model, wrong)
    cache = prefill(model, fine)
    with pytest.raises(DataError, match="the suffix holds the token -1"):
        greedy(model, cache, np.array([-1]), max_new_tokens=1)
    with pytest.raises(DataError, match="the answer starts at token 3 of a suffix of 3"):
        score_suffix(model, cache, fine, 3)
    for start in (0, 3):
        with pytest.raises(DataError, match=f"the answer starts at token {start} of 3, expected 1 to 2"):
            score_answer(model, fine, start)
    with pytest.raises(DataError, match=r"option 2 has shape \[0\]"):
        option_scores(model, cache, fine, [fine, none])
