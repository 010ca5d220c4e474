"""Models that others' code makes, from checkouts that the user names, behind one interface.

No code of a peer is here or comes into this repository: each function loads what it needs from a
folder, and builds the peer on the weights of a given model. What it took to run it beside another
transformers than its own is said in `ran_with`. A peer that does not run raises what stopped it.

Imports nothing of router_tuning, so that a peer also runs beside the transformers it asks for.

A file a peer; what all are to the benchmark stands in subject.py, and how code is taken from a
checkout in checkout.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer_models.d_llm import d_llm
from peer_models.llm_drop import llm_drop
from peer_models.mod import mod
from peer_models.official import official
from peer_models.skipgpt import skipgpt, skipgpt_sparse
from peer_models.subject import Subject, Wanted

PEERS: dict[str, tuple[str, Callable[[Path, Any, Wanted], Subject]]] = {
    "llm-drop": ("CASE-Lab-UMD/LLM-Drop", llm_drop),
    "official": ("CASE-Lab-UMD/Router-Tuning-Mixture-of-Depths", official),
    "skipgpt": ("EIT-NLP/SkipGPT", skipgpt),
    "skipgpt-sparse": ("Sophie10001b/SkipGPT", skipgpt_sparse),
    "mod": ("astramind-ai/Mixture-of-depths", mod),
    "d-llm": ("Jyk-122/D-LLM", d_llm),
}
"""By name: the GitHub repository, and what builds the peer from a checkout of it."""
