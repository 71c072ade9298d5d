"""`gkd bench text`: ways to distil, compared on real text with a language model as the teacher."""
