"""The parts that the recipes of several test files share: a base whose rope is raised, one text, and a stage that is merged with the base."""

HEAD = """\
output: {folder}/run
model: {{path: {folder}/model}}
rope: {{type: abf, rope_theta: 8000000, max_position_embeddings: 2k}}
data:
  long:
    sources: [{{name: books, path: {folder}/books.txt}}]
stages:
"""
MERGED_STAGE = """\
  - name: first
    kind: pretrain
    data: long
    seq_length: 1k
    train_iters: 2
    global_batch_size: 1
    optimizer: {{lr: 1e-4}}
    merge: {{other: base, other_weight: 0.3}}
"""
