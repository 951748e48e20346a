"""Requests of lm-evaluation-harness as tokens: the same as in its Hugging Face backend, for any text; and how the ranks end."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_longctx.errors import ConfigError, DataError
from mcore_longctx.evaluate.cached import OptionScore
from mcore_longctx.recipe.schema import Parallel
from tests.model.llama import SHAPE, build, hf_llama, megatron_names
from tests.multiproc import ProcessFailed, run_processes

from . import tiny_checkpoint as tiny

LIMIT = 64  # tokens that the model is said to be made for
CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
SAME = 1e-4  # nats: transformers in float32 on both sides, once as a batch of one and once by the sums of this test


class OneProcess:
    """Stands for `HarnessRanks`: the same steps by transformers' full forward."""

    def __init__(self, hf: Any, decode: Any) -> None:
        self.hf, self.decode, self.prefills, self.longest = hf, decode, 0, 0
        self.whole: list[int] = []  # the last text that was scored whole

    def logits(self, tokens: Any) -> torch.Tensor:
        self.longest = max(self.longest, len(tokens))
        with torch.no_grad():
            return self.hf(torch.as_tensor(np.asarray(tokens))[None]).logits[0].log_softmax(-1)

    def option_scores(self, context: Any, options: Any) -> list[OptionScore]:
        self.prefills += 1
        found = []
        for option in options:
            rows = self.logits([*context, *option][:-1])[len(context) - 1 :]
            right = rows.gather(1, torch.as_tensor(option)[:, None])
            found.append(OptionScore(float(right.sum()), len(option), bool((rows.argmax(-1) == torch.as_tensor(option)).all())))
        return found

    def log_probability(self, tokens: Any, start: int) -> float:
        self.whole = [int(token) for token in tokens]
        return self.option_scores(tokens[:start], [tokens[start:]])[0].log_probability

    def generate(self, context: Any, wanted: Any) -> list[list[int]]:
        self.prefills += 1
        found = []
        for until, most in wanted:
            said: list[int] = []
            while len(said) < most and not any(text in self.decode(said) for text in until):
                token = int(self.logits([*context, *said])[-1].argmax())
                if token == 257:
                    break
                said.append(token)
            found.append(said)
        return found


@pytest.fixture(scope="module", params=["begins with <s>", "begins with nothing"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Our LM and theirs on one model and tokenizer."""
    from lm_eval.models.huggingface import HFLM

    from mcore_longctx.evaluate.harness_lm import LongctxLM

    folder = tmp_path_factory.mktemp("lm")
    tiny.hf_model(tiny.SCALED).save_pretrained(folder)
    tiny.write_tokenizer(folder)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    if request.param == "begins with nothing":
        plain = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
        (folder / "tokenizer.json").write_text(json.dumps(plain))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", max_length=LIMIT, batch_size=1)
    ranks = OneProcess(theirs.model, lambda ids: theirs.tokenizer.decode(ids, skip_special_tokens=False))
    ours = LongctxLM(ranks, theirs.tokenizer, max_length=LIMIT, info={})
    return SimpleNamespace(ours=ours, theirs=theirs, ranks=ranks, adds=request.param == "begins with <s>")


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments, task_name="task", doc_id=0)


TEXTS = st.lists(st.sampled_from([*"ab .\n", "é", "字", "<s>", "</s>"]), max_size=12).map("".join)


@settings(max_examples=150)
@given(context=TEXTS.filter(bool), continuation=TEXTS)
def test_any_text_becomes_the_same_tokens(both: SimpleNamespace, context: str, continuation: str) -> None:
    assert both.ours.tok_encode(context) == both.theirs.tok_encode(context)
    assert both.ours.tok_encode(context, add_special_tokens=False) == both.theirs.tok_encode(context, add_special_tokens=False)
    assert both.ours._encode_pair(context, continuation) == both.theirs._encode_pair(context, continuation)


def test_a_prompt_gets_a_begin_token_where_the_tokenizer_adds_one_and_never_a_second(both: SimpleNamespace) -> None:
    assert both.ours.tok_encode("ab") == [*([256] if both.adds else []), 97, 98]
    assert both.ours.tok_encode("<s>ab") == [256, 97, 98]


def test_a_whole_text_has_one_more_begin_token_before_it(both: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs: list[tuple[list[int], list[int]]] = []

    def scored(requests: Any, **_: Any) -> list[tuple[float, bool]]:
        theirs.extend((list(context), list(continuation)) for _text, context, continuation in requests)
        return [(0.0, True)] * len(requests)

    monkeypatch.setattr(both.theirs, "_loglikelihood_tokens", scored)
    both.theirs.loglikelihood_rolling([asked("ab")], disable_tqdm=True)
    both.ours.loglikelihood_rolling([asked("ab")], disable_tqdm=True)
    ((before, after),) = theirs
    assert both.ranks.whole == [*before, *after] == [256, *([256] if both.adds else []), 97, 98]


PAIRS = [
    ("A cat", " sat"),
    ("A cat ", "sat"),
    ("A cat\n", " on"),
    ("", "alone"),
    ("", "<s>x"),
    ("<s>Hi", " you"),
    ("A cat", " sat on it"),
]


def test_log_probabilities_are_those_of_the_hugging_face_backend(both: SimpleNamespace) -> None:
    requests = [asked(*pair) for pair in PAIRS]
    mine = both.ours.loglikelihood(requests, disable_tqdm=True)
    for (a, a_greedy), (b, b_greedy) in zip(mine, both.theirs.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert a == pytest.approx(b, abs=SAME)
        assert a_greedy == b_greedy


@pytest.mark.parametrize("characters", [1, 62, 63, 64, 65, 150])
def test_a_whole_text_is_taken_in_the_same_windows(both: SimpleNamespace, characters: int) -> None:
    both.ranks.longest = 0
    request = asked(("the quick brown fox " * 8)[:characters])
    (mine,), (other,) = (
        both.ours.loglikelihood_rolling([request]),
        both.theirs.loglikelihood_rolling([request], disable_tqdm=True),
    )
    assert mine == pytest.approx(other, abs=SAME * characters)
    assert both.ranks.longest <= LIMIT


@pytest.mark.parametrize("until", [[], ["\n"], ["e"], "e", ["zz", "ab"]])
def test_decoding_says_the_same_and_ends_alike(both: SimpleNamespace, until: Any) -> None:
    settings = {"until": until, "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    first = both.theirs.generate_until([asked("Once", dict(settings))], disable_tqdm=True)[0]
    requests = [
        asked(text, {**settings, "until": [first[1:3]] if until == ["zz", "ab"] else until}) for text in ("Once", "A dog ", "")
    ][:2]
    mine, other = both.ours.generate_until(requests, disable_tqdm=True), both.theirs.generate_until(requests, disable_tqdm=True)
    assert mine == other
    if until == ["zz", "ab"]:
        assert len(mine[0]) < len(first)  # it ended at what it would have said


def test_a_context_is_read_once_for_all_its_continuations_and_answers_keep_their_order(both: SimpleNamespace) -> None:
    requests = [asked(context, option) for option in (" a", " bb", " c") for context in ("One", "Another one", "Two")]
    both.ranks.prefills = 0
    mine = both.ours.loglikelihood(requests, disable_tqdm=True)
    assert both.ranks.prefills == 3
    assert [score for score, _ in mine] == pytest.approx(
        [both.ours.loglikelihood([request], disable_tqdm=True)[0][0] for request in requests], abs=SAME
    )
    both.ranks.prefills = 0
    both.ours.generate_until([asked("One", {"max_gen_toks": n, "do_sample": False}) for n in (2, 4)], disable_tqdm=True)
    assert both.ranks.prefills == 1


def test_chats_and_names_are_those_of_the_hugging_face_backend(both: SimpleNamespace) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    assert both.ours.apply_chat_template(chat) == both.theirs.apply_chat_template(chat) == "[user]Hi</s>[assistant]"
    begun = [*chat, {"role": "assistant", "content": "The"}]
    assert both.ours.apply_chat_template(begun, add_generation_prompt=False) == both.theirs.apply_chat_template(begun, False)
    assert both.ours.chat_template(True) == both.theirs.chat_template(True) == CHAT
    assert both.ours.tokenizer_name == both.theirs.tokenizer_name
    assert (both.ours.rank, both.ours.world_size) == (0, 1)


def test_what_is_too_long_is_refused_before_anything_is_read(both: SimpleNamespace) -> None:
    begin = 1 if both.adds else 0
    both.ranks.prefills = 0
    both.ours.loglikelihood([asked("a" * (LIMIT - begin), "b")], disable_tqdm=True)  # the last token is predicted, not read
    assert both.ranks.prefills == 1
    with pytest.raises(
        DataError, match=f"request 1: {LIMIT + 1} tokens of context, but the model is made for {LIMIT}; use shorter"
    ):
        both.ours.loglikelihood([asked("a", "b"), asked("a" * (LIMIT + 1 - begin), "b")], disable_tqdm=True)
    with pytest.raises(
        DataError, match=f"task 0: {LIMIT - 7} tokens of prompt and 8 of answer, but the model is made for {LIMIT}"
    ):
        both.ours.generate_until([asked("a" * (LIMIT - 7 - begin), {"max_gen_toks": 8, "until": []})], disable_tqdm=True)
    assert both.ranks.prefills == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": 0.7}, "task 0: generation_kwargs: asks for sampling; .* set do_sample: false"),
        ({"temperature": 0.7}, "asks for sampling"),
        ({"do_sample": True}, "asks for sampling"),
        ({"num_beams": 4, "do_sample": False}, "num_beams unknown to greedy decoding; leave only until, max_gen_toks"),
    ],
)
def test_sampling_is_refused(both: SimpleNamespace, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        both.ours.generate_until([asked("a", settings)], disable_tqdm=True)


def test_decoding_stops_at_a_stop_string_and_not_later(monkeypatch: pytest.MonkeyPatch) -> None:
    from mcore_longctx.evaluate import cached, harness_ranks

    said = "one two! three"
    read: list[int] = []

    def extend(model: Any, branch: Any, tokens: Any) -> torch.Tensor:
        read.extend(tokens)
        return torch.nn.functional.one_hot(torch.tensor(ord(said[len(read)])), 128).float()

    monkeypatch.setattr(cached, "Branch", lambda cache: None)
    monkeypatch.setattr(cached, "_extend", extend)
    monkeypatch.setattr(cached, "from_first_rank", lambda values: values)
    monkeypatch.setattr(harness_ranks, "prefill", lambda model, tokens: None)
    monkeypatch.setattr(harness_ranks.dist, "get_world_size", lambda: 1)
    ranks = harness_ranks.HarnessRanks(
        lambda: SimpleNamespace(real_vocab_size=128), lambda ids: "".join(map(chr, ids)), frozenset([ord("h")])
    )
    ranks.build()
    for until, most, expected in [
        (("zz", "o!"), 99, "one two!"),
        ((), 99, "one two! t"),
        (("o!",), 5, "one t"),
        (("one",), 99, "one"),
    ]:
        read.clear()
        ((found,),) = [ranks.generate(np.array([1]), [(until, most)])]
        assert "".join(map(chr, found)) == expected
        assert len(read) == len(expected) - (until != () or most == 5)  # what ends it is not read


TEXT_LENGTHS = (37, 5, 2)  # uneven, shorter than 2 x CP, the shortest


def whole_texts(weights: Any, texts: list[torch.Tensor], layouts: list[Parallel]) -> list[list[float]]:
    """Run in each rank: log-probability of each text's tokens from `start` on, in every layout."""
    from mcore_longctx.evaluate.harness_ranks import tokens_log_probability
    from mcore_longctx.megatron_compat import device_context

    found = []
    for parallel in layouts:
        with device_context():
            model = build(parallel, weights).eval()
            found.append([tokens_log_probability(model, text.numpy(), start) for text in texts for start in (1, len(text) - 1)])
    return found


@pytest.mark.multiproc
def test_a_whole_text_has_the_log_probability_of_transformers_on_every_layout() -> None:
    hf = hf_llama()
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(SHAPE.vocab_size, (length,), generator=generator) for length in TEXT_LENGTHS]
    expected = []
    for text in texts:
        with torch.no_grad():
            each = hf(text[None]).logits[0, :-1].double().log_softmax(-1).gather(1, text[1:, None])
        expected += [float(each.sum()), float(each[-1])]
    two = [
        Parallel(context_parallel_size=2),
        Parallel(tensor_model_parallel_size=2),
        Parallel(tensor_model_parallel_size=2, sequence_parallel=True),
    ]
    for found in run_processes(whole_texts, 2, megatron_names(dict(hf.state_dict()), SHAPE), texts, two):
        for layout in found:
            assert layout == pytest.approx(expected, abs=SAME)


def led(fails: str) -> str:
    """One rank of two, whose model is a word. What is asked of the model is not what this is about."""
    import torch.distributed as dist

    from mcore_longctx.evaluate.harness_ranks import HarnessRanks

    def build() -> str:
        if fails == "in a step":
            raise ValueError("no memory")
        return "model"

    ranks = HarnessRanks(build, str, frozenset())
    if dist.get_rank() > 0:
        ranks.serve()
        return f"ended with {ranks._model}"
    try:
        with ranks.leading():
            ranks.build()
            if fails == "in the harness":
                raise KeyError("a task")
    except KeyError as error:
        return f"raised {error}"
    return "done"


@pytest.mark.multiproc
def test_the_other_ranks_end_when_rank_0_is_done_and_when_it_fails() -> None:
    assert run_processes(led, 2, "nowhere") == ["done", "ended with model"]
    assert run_processes(led, 2, "in the harness") == ["raised 'a task'", "ended with model"]


@pytest.mark.multiproc
def test_an_error_inside_a_step_ends_every_rank_with_it() -> None:
    with pytest.raises(ProcessFailed, match="no memory"):
        run_processes(led, 2, "in a step")
