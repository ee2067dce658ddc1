"""What exists, and which snapshot a restore should try first. Layer: above ``arena``; ``candidates`` is pure."""
