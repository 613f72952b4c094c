"""Answers judged by a strong model: questions, the model's answers, a judge behind an endpoint, and what its marks say."""
