"What the nodes of the bundled thought trees claim, as expressions: (true ones, false ones) of each tree, by local id."
from fractions import Fraction as F
from itertools import combinations, product

def xs():
    "The values of x in the body of the loop."
    out, x = [], 1
    while x < 50: out.append(x); x = 2*x + 1
    return out

def worlds():
    "Who can be a knight: (A, B, C)."
    return [(a, b, c) for a, b, c in product([True, False], repeat=3) if a == (not b) and b == (a == c)]

def f(n): return n if n < 2 else f(n - 1) + 2*f(n - 2)

def syll(claim):
    "Whether a claim on glims, trels, vars and red things follows; all models of three things are tried."
    subs = [frozenset(s) for k in range(4) for s in combinations(range(3), k)]
    return all(claim(G, T, V, R) for G in subs if G for T in subs if G <= T for V in subs if T & V for R in subs if not V & R)

def ndiv(n): return sum(n % d == 0 for d in range(1, n + 1))

def bubble(passes):
    "(list, swaps) after so many passes."
    L, swaps = [6, 3, 8, 1, 5], 0
    for _ in range(passes):
        for i in range(4):
            if L[i] > L[i + 1]: L[i], L[i + 1], swaps = L[i + 1], L[i], swaps + 1
    return L, swaps

def inv(): return sum(a > b for a, b in combinations([6, 3, 8, 1, 5], 2))

def cnt(p): return sum(len(set(str(n))) == 4 and bool(p(n)) for n in range(1000, 10000))

CLAIMS = [
    # A baker fills 12 trays with 8 rolls each. She sells 5 bags of 15 rolls and gives 9 rolls t
    (dict(),
     {2: '12*8==20',
      6: '5*15==65',
      9: '96-75-9==30',
      15: '96-75-9==22'}),
    # What does this Python code print?
    ({4: 'xs()==[1,3,7,15,31]',
      7: 'not 63<50',
      11: 'len(xs())==5',
      12: 'sum(xs())==57'},
     {2: 'xs()==[1,2,4,8,16,32]',
      6: '63<50',
      9: '1+3+7+15+31==56',
      13: 'sum(xs())==120'}),
    # A pump moves 0.6 litres of water per second. How many cubic metres does it move in 2 hours
    (dict(),
     {2: "F('2.3')==2+F(30,60)",
      6: '150*60==900',
      10: '10**3==100',
      16: "F('0.6')*9000==4320",
      20: "F('0.6')*9000/1000==F('4.32')"}),
    # On an island each person is a knight, who always tells the truth, or a knave, who always l
    ({1: 'all(not b for a,b,c in worlds() if a)',
      2: 'all(not c for a,b,c in worlds() if a)',
      4: 'all(not c for a,b,c in worlds() if a)',
      5: 'all(not c for a,b,c in worlds() if a)',
      6: 'all(b for a,b,c in worlds() if not a)',
      7: 'all(not c for a,b,c in worlds() if not a)',
      11: 'any(not a and b for a,b,c in worlds())',
      13: 'all(not c for a,b,c in worlds() if a)',
      14: 'all(not c for a,b,c in worlds())',
      16: '(False,True,False) in worlds() and len(worlds())==2'},
     {3: 'any(c for a,b,c in worlds() if a)',
      8: 'any(c for a,b,c in worlds() if not a)',
      10: 'all(a for a,b,c in worlds())',
      15: 'len(worlds())==1'}),
    # What is the remainder when 7^100 is divided by 13?
    ({1: 'pow(7,12,13)==1',
      3: 'pow(7,13,13)==7',
      4: 'pow(7,12,13)==1',
      5: 'pow(7,100,13)==pow(7,4,13)',
      9: 'pow(7,4,13)==9',
      15: 'pow(7,100,13)==9'},
     {2: 'pow(7,13,13)==1',
      6: '100==8*12+6 or pow(7,100,13)==pow(7,6,13)',
      10: 'pow(7,4,13)==7',
      12: '2401==184*13+8',
      17: 'pow(7,100,13)==8'}),
    # A jacket costs 80 euros. In a sale its price is cut by 25%, and at the till another 10% is
    ({3: 'F(60)/10==6'},
     {2: 'F(80)*75/100*90/100==52',
      5: 'F(80)*75/100*90/100==52'}),
    # A function is defined by f(n) = n if n < 2, and f(n) = f(n-1) + 2*f(n-2) otherwise. Which 
    ({1: 'f(0)==0 and f(1)==1',
      3: 'f(0)==0',
      4: 'f(2)==1 and f(3)==3',
      5: 'f(4)==5 and f(5)==11',
      6: 'f(6)==21',
      8: 'f(4)==5',
      9: 'f(4)==5',
      11: 'f(5)==11',
      12: 'f(6)==21',
      13: 'all(f(n)==(2**n-(-1)**n)//3 for n in range(20))'},
     {2: 'f(0)==1',
      7: 'f(4)==4',
      10: 'f(5)==21',
      16: 'f(6)==18'}),
    # A stone falls from rest, without air resistance; take 10 m/s^2 for gravity. How many metre
    (dict(),
     {2: 'F(10)*9/2-F(10)*4/2==5',
      6: 'F(10)*9/2-F(10)*4/2==45',
      11: 'F(20+30)/2==30',
      16: 'F(10)*9/2-F(10)*4/2==5'}),
    # A bag holds 5 red and 3 blue marbles. Two are drawn at random, without putting the first o
    ({20: '5*3==15 and 28-15==13'},
     {3: 'F(5,8)*F(4,7)==F(25,64)',
      7: 'F(3,8)*F(2,7)==F(6,15)',
      10: 'F(20,56)+F(6,56)==F(120,3136)',
      16: '10+3==15',
      19: 'F(13,28)==F(1,2)'}),
    # All glims are trels. Some trels are vars. No var is red. Must it be true that some glim is
    ({5: 'not syll(lambda G,T,V,R: bool(G&V))',
      6: 'not syll(lambda G,T,V,R: bool(G&V))',
      8: '({1}<={1,2}) and bool({1,2}&{2}) and not ({2}&{1})',
      11: 'not syll(lambda G,T,V,R: bool(G-R))',
      13: 'not syll(lambda G,T,V,R: bool(G-R))'},
     {2: 'syll(lambda G,T,V,R: bool(G-R))',
      4: 'syll(lambda G,T,V,R: bool(G&V))',
      9: 'syll(lambda G,T,V,R: not T&R)',
      12: 'syll(lambda G,T,V,R: bool(G-R))'}),
    # How many positive divisors does 360 have?
    ({7: 'all(360%d==0 for d in (1,2,3,4,5,6,8))',
      8: 'ndiv(360)==24',
      11: 'ndiv(360)==24',
      12: 'all((d<19)!=(360//d<19) for d in range(1,361) if 360%d==0)',
      13: '[d for d in range(1,19) if 360%d==0]==[1,2,3,4,5,6,8,9,10,12,15,18]'},
     {2: '360==2**2*3**2*5',
      6: 'ndiv(360)==6',
      9: 'ndiv(360)==9',
      14: '[d for d in range(1,19) if 360%d==0]==[1,2,3,4,5,6,9,10,12,15,18]',
      18: 'ndiv(360)==22'}),
    # Bubble sort goes through the list [6, 3, 8, 1, 5] again and again, swapping neighbours tha
    ({1: 'bubble(1)==([3,6,1,5,8],3)',
      3: 'bubble(1)==([3,6,1,5,8],3)',
      4: 'bubble(1)==([3,6,1,5,8],3)',
      5: 'bubble(2)==([3,1,5,6,8],5)',
      7: '[3,6,1,5,8][1]==6',
      8: 'bubble(3)==([1,3,5,6,8],6)',
      9: 'inv()==6 and bubble(9)[1]==6',
      10: 'inv()==6',
      13: 'inv()==6',
      14: 'bubble(9)[1]==6'},
     {2: 'bubble(1)==([3,6,1,8,5],2)',
      6: 'bubble(2)[0]==[1,6,3,5,8]',
      11: 'inv()==5',
      16: 'bubble(9)[1]==5'}),
    # A right triangle has legs of 9 cm and 12 cm. How high is it above its longest side, in cm?
    ({9: "F('14.4')>9",
      14: "F('7.2')/9==F(12,15)"},
     {2: '9**2+12**2==21**2',
      6: 'F(9*12,2)==108',
      8: "F(2*54,15)==F('14.4')",
      11: "F(2*54,15)==F('3.6')",
      16: "F('7.2')==F('11.25')"}),
    # A car drives 60 km at 40 km/h and then 60 km at 60 km/h. What is its average speed over th
    (dict(),
     {2: 'F(120)/(F(60,40)+1)==50',
      6: 'F(60,40)==F(2,3)',
      9: "F(120)/F('2.5')==24",
      14: "F(120)/F('2.5')==50"}),
    # Mia is 4 years older than Ben. In 6 years the two will be 40 years old together. How old i
    ({14: 'all((b+6)+(b+10)==2*b+16 for b in range(9))'},
     {3: '40-2*6==34',
      5: 'F(40-12-4,2)==15',
      9: 'F(40-12-4,2)==14',
      15: '2*28+16==40',
      19: '(28+6)+(28+10)==40'}),
    # How many even numbers with four digits, from 1000 to 9999, have no digit twice?
    ({2: 'cnt(lambda n: n%10==0)==504',
      4: 'cnt(lambda n: n%10==0)==504',
      5: 'cnt(lambda n: n%10==0)==504',
      7: 'cnt(lambda n: n%10 in (2,4,6,8))==1792',
      10: 'cnt(lambda n: n%10 in (2,4,6,8))==1792',
      13: 'cnt(lambda n: n%10 in (2,4,6,8))==1792',
      14: 'cnt(lambda n: n%2==0)==2296',
      17: 'cnt(lambda n: n%2==0)==2296',
      18: 'cnt(lambda n: True)==4536',
      19: 'cnt(lambda n: n%2)==2240',
      20: 'cnt(lambda n: n%2==0)==2296',
      22: 'cnt(lambda n: n%10==0)>cnt(lambda n: n%10==1)',
      24: 'cnt(lambda n: True)==4536',
      26: 'cnt(lambda n: n%2==0)==2296',
      28: 'cnt(lambda n: n%2==0)==2296'},
     {3: 'cnt(lambda n: n%10==0)==648',
      8: 'cnt(lambda n: n%10 in (2,4,6,8))==2304',
      11: 'cnt(lambda n: n%10 in (2,4,6,8))==2016',
      15: 'cnt(lambda n: n%2==0)==903168',
      21: 'cnt(lambda n: n%2==0)==2268',
      23: 'cnt(lambda n: True)==5040',
      27: 'cnt(lambda n: n%2==0)==2268'}),
]
