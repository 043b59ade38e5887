"""What decides: pure Python, without torch, without a clock, without input or output."""
