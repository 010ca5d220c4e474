"""What results hold: the keys in their JSON, and what people call them."""

CURVES = {
    "routed": "routers",
    "random": "random, per layer",
    "random_uniform": "random, uniform",
    "static_cosine": "static, cosine",
    "static_greedy": "static, greedy",
    "learned_static": "static, learned",
}

SPEED = {
    "all_kept": "all kept",
    "routed": "routers",
    "random": "random",
    "static": "static",
    "floor": "floor",
    "masked": "masked",
}
"""Variants of a benchmark, beside dense."""
