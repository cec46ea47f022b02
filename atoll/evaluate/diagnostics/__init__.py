"""How experts, router and fusion behave along a sampling trajectory."""
