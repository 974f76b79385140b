"""Small experiments that show why the objectives are what they are."""
