"""What is in a data set or a mix of them, gathered (`facts`, `plans`, `views`) and shown on one page (`page`)."""
