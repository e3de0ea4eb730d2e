"""Text from text: the next token, and with chat the answers alone."""
