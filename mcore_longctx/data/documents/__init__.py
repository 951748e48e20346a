"""What a source holds: files cut into tasks, records, documents, chats."""
