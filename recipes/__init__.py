"""The three training setups: `python -m recipes.bert`, `recipes.gpt`, `recipes.vit`."""
