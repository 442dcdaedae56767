"""Plans and explanations for people: text, tables, a page."""
