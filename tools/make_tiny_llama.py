"""Train the tiny Llama of the demo from nothing: `examples/tiny-llama`.

    export OMP_NUM_THREADS=1
    python tools/make_tiny_llama.py --work build/tiny --out examples/tiny-llama --seed 0     # 480 CPU-seconds, 8 minutes

The model reads bytes (256 of them and six special tokens), has a trained context of 512 and finds pass keys there.
Each line of the log is one stretch of 20 steps: loss on plain bytes, share of the answers' digits that are right.

Why it is trained this way (docs/tiny_model.md has the trials): keys of eight digits first, since ordered copying is
then the only way to a low loss; a stage ends on its accuracy and not at a fixed step; Muon on the matrices.
Needs torch >= 2.9 (torch.optim.Muon), transformers >= 4.57, safetensors, tokenizers.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import tiny_texts
import torch
import torch.nn.functional as F
from tiny_texts import NEEDLE, QUESTION
from transformers import LlamaConfig, LlamaForCausalLM

TRAINED_CONTEXT = 512
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
BOS, EOS, PAD = 256, 257, 258
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n' }}{% endif %}"
)
ANSWER_WEIGHT = 10.0
REPORT_STEPS = 20


@dataclass(frozen=True)
class Stage:
    """Ends when the last 20 steps get `target` of the answers' digits right, or after `steps`."""

    length: int
    batch: int
    steps: int
    digits: int
    needles: int  # at most, in one sample
    plain: float  # share of samples without needle
    lr: float  # of AdamW; Muon has seven times as much
    lr_end: float = 1.0  # cosine to this share of lr at `steps`
    target: float = 2.0


STAGES = (
    Stage(96, 22, 400, digits=8, needles=1, plain=0.1, lr=3e-3, target=0.95),
    Stage(192, 11, 240, digits=8, needles=2, plain=0.1, lr=1.5e-3, target=0.93),
    Stage(512, 4, 300, digits=8, needles=4, plain=0.1, lr=1e-3, target=0.93),
    Stage(512, 8, 400, digits=3, needles=4, plain=0.4, lr=1e-3, lr_end=0.05),
)


# ----------------------------------------------------------------- samples
class Samples:
    """Slices of a text with pass keys between its lines and the questions at the end."""

    def __init__(self, text: bytes, seed: int):
        self.text, self.rng = text, random.Random(seed)

    def slice(self, length: int) -> bytes:
        """`length` bytes of the text from a random place."""
        start = self.rng.randrange(len(self.text) - length)
        return self.text[start : start + length]

    def plain(self, length: int) -> tuple[list[int], list[bool]]:
        """Ids [length + 1] and which of the length targets are digits of an answer: none."""
        return self.with_bos(list(self.slice(length + 1))), [False] * length

    def needles(self, length: int, count: int, digits: int) -> tuple[list[int], list[bool]]:
        """`count` pass keys in a slice, each asked at the end in another order -> ids [length + 1], mask [length]."""
        facts = [
            NEEDLE.format(key=key, value=tiny_texts.new_value(self.rng, digits)).encode()
            for key in tiny_texts.new_keys(self.rng, count)
        ]
        asked = self.rng.sample(facts, count)
        room = length + 1 - 2 * sum(map(len, facts))
        if room < 0:
            raise ValueError(f"{count} pass keys of {digits} digits do not fit in {length} tokens")
        ids = self.with_bos(list(insert_lines(self.rng, self.slice(room), facts)))
        mask = [False] * (len(ids) - 1)
        for fact in asked:
            ids += fact
            first = len(fact) - len(".\n") - digits
            mask += [first <= i < first + digits for i in range(len(fact))]
        return ids, mask

    def with_bos(self, ids: list[int]) -> list[int]:
        """Half of the samples begin with the begin token, so that the model works with it and without."""
        if ids and self.rng.random() < 0.5:
            ids[0] = BOS
        return ids

    def batch(self, stage: Stage) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [batch, length + 1] and the mask of the answers' digits [batch, length]."""
        rows = []
        for _ in range(stage.batch):
            if self.rng.random() < stage.plain:
                rows.append(self.plain(stage.length))
            else:
                rows.append(self.needles(stage.length, self.rng.randint(1, stage.needles), stage.digits))
        ids, masks = zip(*rows, strict=True)
        return torch.tensor(ids), torch.tensor(masks)


def insert_lines(rng: random.Random, text: bytes, lines: list[bytes]) -> bytes:
    """`text` with each of `lines` at the line start nearest to a random place."""
    starts = line_starts(text)
    places = [nearest(starts, rng.random() * len(text)) for _ in lines]
    parts, done = [], 0
    for place, line in sorted(zip(places, lines, strict=True), key=lambda pair: pair[0]):
        parts += [text[done:place], line]
        done = place
    return b"".join([*parts, text[done:]])


def line_starts(text: bytes) -> list[int]:
    """Offsets at which lines begin, 0 among them."""
    return [0] + [i + 1 for i, byte in enumerate(text) if byte == ord("\n")]


def nearest(places: list[int], wanted: float) -> int:
    """The place that is closest to the wanted one; the first of two."""
    return min(places, key=lambda place: abs(place - wanted))


# ---------------------------------------------------------------- training
def new_model(seed: int) -> LlamaForCausalLM:
    """803,968 + 2 x 6 x 128 weights; matrices start at 1/sqrt(inputs), the residual ones smaller by depth."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256 + len(SPECIAL_TOKENS),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=TRAINED_CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config).float()
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            std = 0.02 if "embed" in name or "lm_head" in name else weight.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * config.num_hidden_layers)
            torch.nn.init.normal_(weight, std=std)
    return model


def new_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon on the layers' matrices, AdamW on the rest; the rates are set in every step."""
    matrices = [w for n, w in model.named_parameters() if w.ndim == 2 and "layers" in n]
    rest = [w for n, w in model.named_parameters() if not (w.ndim == 2 and "layers" in n)]
    return [
        torch.optim.Muon(matrices, lr=0.0, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(stage: Stage, step: int) -> float:
    """Twenty steps of warm-up, then a cosine from lr to lr x lr_end."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return stage.lr * min(1.0, (step + 1) / 20) * (stage.lr_end + (1 - stage.lr_end) * cosine)


def train_step(
    model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], lr: float, ids: torch.Tensor, answers: torch.Tensor
) -> tuple[float, int, int]:
    """One update -> loss of the bytes that are no answer, right digits, digits."""
    for optimizer, ratio in zip(optimizers, (7.0, 1.0), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * ratio
    logits = model(ids[:, :-1], use_cache=False).logits
    targets = ids[:, 1:]
    loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    weight = 1.0 + ANSWER_WEIGHT * answers
    ((loss * weight).sum() / weight.sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    right = (logits.detach().argmax(-1) == targets) & answers
    return loss.detach()[~answers].mean().item(), int(right.sum()), int(answers.sum())


def train(model: LlamaForCausalLM, text: bytes, seed: int, stages: tuple[Stage, ...] = STAGES) -> None:
    """Train in place through the stages and print a line every 20 steps."""
    samples, optimizers = Samples(text, seed), new_optimizers(model)
    for number, stage in enumerate(stages):
        losses, right, digits = [], 0, 0
        for step in range(stage.steps):
            loss, hit, count = train_step(model, optimizers, learning_rate(stage, step), *samples.batch(stage))
            losses, right, digits = [*losses, loss], right + hit, digits + count
            if (step + 1) % REPORT_STEPS:
                continue
            accuracy = right / max(digits, 1)
            print(
                f"stage {number}  step {step + 1}/{stage.steps}  length {stage.length}  "
                f"loss {sum(losses) / len(losses):.4f}  digits {accuracy:.3f}  "
                f"{time.process_time():.0f} CPU-s",
                flush=True,
            )
            if accuracy >= stage.target:
                break
            losses, right, digits = [], 0, 0


# ------------------------------------------------------------------ export
def byte_alphabet() -> list[str]:
    """Printable stand-in of each byte, as GPT-2 and the `tokenizers` library's ByteLevel have them."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = iter(range(256, 512))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(256)]


def write_tokenizer(folder: Path) -> None:
    """Byte vocabulary: the id of a byte is its value; the special tokens follow from 256 on."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIAL_TOKENS[0],
                "eos_token": SPECIAL_TOKENS[1],
                "pad_token": SPECIAL_TOKENS[2],
                "clean_up_tokenization_spaces": False,
                "model_max_length": TRAINED_CONTEXT,
                "chat_template": CHAT_TEMPLATE,
            },
            indent=2,
        )
        + "\n"
    )


def write_model(model: LlamaForCausalLM, folder: Path) -> None:
    """The folder transformers reads; config.json in the spelling that 4.x and 5.x both know."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().clone().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    c = model.config
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": c.vocab_size,
                "hidden_size": c.hidden_size,
                "intermediate_size": c.intermediate_size,
                "num_hidden_layers": c.num_hidden_layers,
                "num_attention_heads": c.num_attention_heads,
                "num_key_value_heads": c.num_key_value_heads,
                "head_dim": c.head_dim,
                "hidden_act": "silu",
                "initializer_range": 0.02,
                "rms_norm_eps": c.rms_norm_eps,
                "rope_theta": 10000.0,
                "rope_scaling": None,
                "max_position_embeddings": TRAINED_CONTEXT,
                "tie_word_embeddings": False,
                "attention_bias": False,
                "attention_dropout": 0.0,
                "mlp_bias": False,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                "pad_token_id": PAD,
                "torch_dtype": "float32",
                "use_cache": True,
            },
            indent=2,
        )
        + "\n"
    )
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": BOS, "eos_token_id": [EOS, BOS + 5], "pad_token_id": PAD, "do_sample": False}, indent=2)
        + "\n"
    )
    write_tokenizer(folder)


def check_folder(model: LlamaForCausalLM, folder: Path, text: bytes) -> float:
    """Largest difference between the logits in memory and those of the folder read again."""
    again = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([list(text[:TRAINED_CONTEXT])])
    with torch.no_grad():
        return (model.eval()(ids).logits - again(ids).logits).abs().max().item()


# -------------------------------------------------------------- measurement
@torch.no_grad()
def count_found(model: LlamaForCausalLM, text: bytes, length: int, seed: int, per_depth: int) -> tuple[int, int]:
    """Samples of which every digit is the most probable token -> (right, all); depths 0, 0.2, ... 1."""
    samples, right = Samples(text, seed), 0
    depths = [i / 5 for i in range(6)]
    for depth in depths * per_depth:
        key, value = tiny_texts.new_keys(samples.rng, 1)[0], tiny_texts.new_value(samples.rng)
        needle, end = NEEDLE.format(key=key, value=value).encode(), f"{QUESTION.format(key=key)} {value}".encode()
        text_slice = samples.slice(length - len(needle) - len(end))
        place = nearest(line_starts(text_slice), depth * len(text_slice))
        ids = torch.tensor([list(text_slice[:place] + needle + text_slice[place:] + end)])
        logits = model(ids[:, :-1], use_cache=False, logits_to_keep=len(value)).logits
        right += bool((logits.argmax(-1) == ids[:, -len(value) :]).all())
    return right, per_depth * len(depths)


def main() -> None:
    """Fetch, train, write, read again, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of kjv.txt and devil.txt, fetched if absent")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tiny_texts.fetch_texts(options.work)
    texts = tiny_texts.read_texts(options.work)
    model = new_model(options.seed)
    print(f"{sum(w.numel() for w in model.parameters()):,} weights, {len(texts.training_text()):,} training bytes")
    train(model, texts.training_text(), options.seed)
    write_model(model, options.out)
    print(f"folder read again: logits differ by {check_folder(model, options.out, texts.heldout_text()):.1e} at most")
    for length in (256, 512, 1024, 2048, 4096):
        right, count = count_found(model, texts.heldout_text(), length, seed=length, per_depth=10)
        print(f"pass keys found at {length:,}: {right}/{count}", flush=True)


if __name__ == "__main__":
    main()
