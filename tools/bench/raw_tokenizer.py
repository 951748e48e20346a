"""The limit of a tokenizing run: gigatoken alone, document by document, texts in memory. Prints one line of JSON.

python tools/bench/raw_tokenizer.py str|bytes TOKENIZER_JSON FILE.jsonl ...

The CPU-seconds are those of the calls of `encode`: no reading, no JSON, no start, no load of the tokenizer. Text that looks like a
special token is ordinary text, as in `mcore-longctx data tokenize`. `bytes` hands UTF-8 over, which spares gigatoken a conversion.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from data_documents import fingerprint


def main(kind: str, tokenizer: str, *inputs: str) -> None:
    """Encode all texts of the files and print what it cost."""
    import gigatoken

    spec = json.loads(Path(tokenizer).read_bytes())
    spec["added_tokens"], spec["post_processor"] = [], None
    encode = gigatoken.Tokenizer.from_json(json.dumps(spec)).encode
    texts: list[str | bytes] = []
    for path in inputs:
        with Path(path).open("rb") as lines:
            texts += (json.loads(line)["text"] for line in lines)
    if kind == "bytes":
        texts = [text.encode() for text in texts if isinstance(text, str)]
    cpu, wall = time.process_time(), time.perf_counter()
    documents = [encode(text) for text in texts]
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(json.dumps({"cpu": cpu, "wall": wall, "fingerprint": fingerprint(documents)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
