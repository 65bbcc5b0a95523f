"""The page of results, made of the JSON files of all benchmarks."""
