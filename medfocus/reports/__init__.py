"""The reports of a study: tables, figures, the page and the cards.

``rows`` reads and writes the scores. ``tables``, ``figures``, ``controls``, ``verdicts`` and
``data_warnings`` turn them into tables, images and sentences. ``page`` renders a ``PageContent`` as HTML;
``model_card`` and ``data_sheet`` write Markdown. This room may import images, datasets, evaluation and
storage.
"""
