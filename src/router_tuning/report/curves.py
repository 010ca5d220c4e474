"""The curves of an evaluation: their keys in its JSON, and what people call them."""

CURVES = {
    "routed": "routers",
    "random": "random, per layer",
    "random_uniform": "random, uniform",
    "static_cosine": "static, cosine",
    "static_greedy": "static, greedy",
    "learned_static": "static, learned",
}
