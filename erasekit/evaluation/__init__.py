"""How an erasure is evaluated: judged images, the field's rates, attacks on the public model, and cost."""
