"""The engine (DeepSpeed), the loop, the checkpoints, and the guards around them."""
