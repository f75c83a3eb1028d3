"""Read image files as (H, W, 3) uint8 RGB. This room may import storage.

``decode`` reads an image file within limits of format, bytes and pixels; ``dicom`` and ``nifti`` read files
of several images behind one interface, ``stack.Stack``. ``geometry`` resizes images with their masks,
``contact_sheet`` arranges images on one sheet, and ``png`` encodes them. A file without a usable image raises
``errors.ImageError``.
"""
