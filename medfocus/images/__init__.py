"""From a file's bytes to pixels: PNG and the like, DICOM, NIfTI. It may import storage."""
