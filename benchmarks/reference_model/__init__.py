"""Pictures, splits and judges for the reference checkpoint, a small Stable Diffusion trained on emoji."""
