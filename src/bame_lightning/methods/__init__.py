"""What a method does in a step, without Lightning."""
