"""The networks of the batch normalization paper."""
