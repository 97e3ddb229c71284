"""The three training commands: `python -m recipes.bert`, `recipes.gpt`, `recipes.vit`."""
