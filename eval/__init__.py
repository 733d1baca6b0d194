"""Measuring: metrics, BD-rate, anchors, peers, benchmarks."""
