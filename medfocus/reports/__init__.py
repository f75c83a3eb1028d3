"""Tables, figures, pages and cards of a study. It may import datasets, evaluation and all below."""
