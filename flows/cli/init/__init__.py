"""``medfocus init``: a folder or a table of images becomes a params file.

``dataset.describe`` reads the images, ``columns`` and ``modality`` guess what the user left open, and
``params_file`` writes the file.
"""
