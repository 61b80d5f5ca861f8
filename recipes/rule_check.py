"""The rule of `recipes.rules` on bandits that it was not made from: arms and pulls alone, beside UCB1 at its best."""

#: Arms and pulls of the cells, chosen before the rule was tuned on any: the rule was not made from them.
HELD_OUT = ((3, 150), (8, 25), (12, 70), (20, 40), (30, 110))
