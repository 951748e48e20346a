"""What a conversion will write, byte for byte, before a byte is written."""
