"""Views of an image under its mask. It may import masks, clip, images and storage."""
