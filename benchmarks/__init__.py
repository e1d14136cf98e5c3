"""Side-by-side measurements; results stand in docs/benchmarks.md."""
