"""Documents and chats to token shards, in tasks."""
