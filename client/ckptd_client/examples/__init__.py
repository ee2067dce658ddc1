"""Programs to copy from: each trains something real and uses only the public interface."""
