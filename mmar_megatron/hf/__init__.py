"""Hugging Face, in and out: pretrained language models become checkpoints, checkpoints become models that anyone loads.

`configuration_mmar.py`, `modeling_mmar.py` and `processing_mmar.py` ship with exported weights, together with the
plain-torch files they need (`shipping.py`); all else converts.
"""
