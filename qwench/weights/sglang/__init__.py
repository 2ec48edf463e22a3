"""SGLang as a receiver of weights: what it takes, and what it must report to hold afterwards."""
