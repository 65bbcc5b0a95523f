"""The networks that are measured: those of the batch normalization paper, and common ones for images."""
