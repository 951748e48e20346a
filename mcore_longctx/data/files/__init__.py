"""The files of this room: columns with a checksum, token shards, indexed datasets, sidecars."""
