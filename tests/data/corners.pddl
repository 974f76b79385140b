; A small household with everything in it that ALFWorld's engine treats oddly.
(define (problem corners)
(:domain alfred)
(:objects
  agent1 - agent
  Cabinet_bar_1 - receptacle
  Cabinet_bar_2 - receptacle
  CounterTop_bar_1 - receptacle
  Sink_bar_1_bar_SinkBasin - receptacle
  Sink_bar_2 - receptacle
  Fridge_bar_1 - receptacle
  Microwave_bar_1 - receptacle
  Desk_bar_1 - receptacle
  Apple_bar_1 - object
  Apple_bar_2 - object
  Knife_bar_1 - object
  Mug_bar__minus_1_dot_5 - object
  Bowl_bar_1 - object
  Spoon_bar_1 - object
  DeskLamp_bar_1 - object
  Egg_bar_1 - object
  nowhere - location
  loc_a - location
  loc_b - location
  loc_c - location
  loc_d - location
  loc_e - location
  CabinetType CounterTopType SinkBasinType SinkType FridgeType MicrowaveType DeskType - rtype
  AppleType KnifeType MugType BowlType SpoonType DeskLampType EggType - otype
)
(:init
  (= (total-cost) 0)
  (atLocation agent1 nowhere)
  ; two cabinets share a location, and so do the counter, the basin and the bare sink
  (receptacleAtLocation Cabinet_bar_1 loc_a) (receptacleAtLocation Cabinet_bar_2 loc_a)
  (receptacleAtLocation CounterTop_bar_1 loc_b) (receptacleAtLocation Sink_bar_1_bar_SinkBasin loc_b)
  (receptacleAtLocation Sink_bar_2 loc_e)
  (receptacleAtLocation Fridge_bar_1 loc_c) (receptacleAtLocation Microwave_bar_1 loc_c)
  (receptacleAtLocation Desk_bar_1 loc_d)
  (openable Cabinet_bar_1) (openable Cabinet_bar_2) (openable Fridge_bar_1) (openable Microwave_bar_1)
  (opened Cabinet_bar_2)
  (receptacleType Cabinet_bar_1 CabinetType) (receptacleType Cabinet_bar_2 CabinetType)
  (receptacleType CounterTop_bar_1 CounterTopType)
  (receptacleType Sink_bar_1_bar_SinkBasin SinkBasinType) (receptacleType Sink_bar_2 SinkType)
  (receptacleType Fridge_bar_1 FridgeType) (receptacleType Microwave_bar_1 MicrowaveType)
  (receptacleType Desk_bar_1 DeskType)
  (canContain CabinetType MugType) (canContain CabinetType BowlType) (canContain CabinetType AppleType)
  (canContain CounterTopType AppleType) (canContain CounterTopType KnifeType) (canContain CounterTopType MugType)
  (canContain SinkBasinType AppleType) (canContain SinkBasinType MugType)
  (canContain FridgeType AppleType) (canContain FridgeType EggType) (canContain FridgeType MugType)
  (canContain MicrowaveType MugType) (canContain DeskType MugType) (canContain DeskType BowlType)
  (objectType Apple_bar_1 AppleType) (objectType Apple_bar_2 AppleType) (objectType Knife_bar_1 KnifeType)
  (objectType Mug_bar__minus_1_dot_5 MugType) (objectType Bowl_bar_1 BowlType) (objectType Spoon_bar_1 SpoonType)
  (objectType DeskLamp_bar_1 DeskLampType) (objectType Egg_bar_1 EggType)
  (pickupable Apple_bar_1) (pickupable Apple_bar_2) (pickupable Knife_bar_1) (pickupable Mug_bar__minus_1_dot_5)
  (pickupable Bowl_bar_1) (pickupable Egg_bar_1)
  (cleanable Apple_bar_1) (heatable Apple_bar_1) (coolable Apple_bar_1) (sliceable Apple_bar_1)
  (cleanable Apple_bar_2) (heatable Apple_bar_2) (coolable Apple_bar_2) (sliceable Apple_bar_2)
  (cleanable Mug_bar__minus_1_dot_5) (heatable Mug_bar__minus_1_dot_5)
  (toggleable DeskLamp_bar_1)
  (isCool Egg_bar_1)
  (isReceptacleObject Bowl_bar_1) (inReceptacleObject Spoon_bar_1 Bowl_bar_1)
  ; an apple in two receptacles at once
  (inReceptacle Apple_bar_1 CounterTop_bar_1) (inReceptacle Apple_bar_1 Sink_bar_1_bar_SinkBasin)
  (inReceptacle Apple_bar_2 Cabinet_bar_1) (inReceptacle Mug_bar__minus_1_dot_5 Cabinet_bar_1)
  (inReceptacle Knife_bar_1 CounterTop_bar_1) (inReceptacle Bowl_bar_1 Desk_bar_1)
  (inReceptacle Spoon_bar_1 Desk_bar_1) (inReceptacle DeskLamp_bar_1 Desk_bar_1)
  (inReceptacle Egg_bar_1 Fridge_bar_1)
  (objectAtLocation Apple_bar_1 loc_b) (objectAtLocation Knife_bar_1 loc_b)
  (objectAtLocation Apple_bar_2 loc_a) (objectAtLocation Mug_bar__minus_1_dot_5 loc_a)
  (objectAtLocation Bowl_bar_1 loc_d) (objectAtLocation Spoon_bar_1 loc_d)
  (objectAtLocation DeskLamp_bar_1 loc_d) (objectAtLocation Egg_bar_1 loc_c)
)
(:goal (exists (?r - receptacle ?o - object)
  (and (heatable ?o) (objectType ?o AppleType) (receptacleType ?r FridgeType) (isHot ?o) (inReceptacle ?o ?r))))
)
