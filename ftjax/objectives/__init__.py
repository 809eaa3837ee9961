"""What is minimised: the sums of each loss, which ftjax.tasks refers to."""
