"""One run: may it resume here, and what does it do?"""
