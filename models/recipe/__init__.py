"""The recipe of `atelier`, the model that ships with img2img: from photos to the export."""
