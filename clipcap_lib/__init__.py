"""Two-stage Chinese image captioning: CLIP pretraining, then the same GPT writes."""
