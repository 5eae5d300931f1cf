"""The command line: `model1 VERB`, one module per verb."""
