"""Long chats that nobody has written: tables and dictionaries with computed answers, and questions about documents by a writer.

The chats are JSON lines that `data build` reads (stage kind `sft`). Each is a pure function of (seed, index) and of the tokenizer, by
which its length is counted: `tables.py` (LongSkywork, arXiv 2406.00605), `key_value.py` (arXiv 2406.19292), `hierarchical.py` (He et
al., arXiv 2504.12637).
"""
