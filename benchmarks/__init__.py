"""Benchmarks: `make bench` on a CPU, `make gpu` on a GPU; see README.md, "Benchmarks"."""
