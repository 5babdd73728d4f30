"""A page to try a model: what it does as plain Python, and the page itself (`page.py`), which alone knows gradio."""
