"""Perplexity: meter, report, evaluation of a language model on documents."""
