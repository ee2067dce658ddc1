"""The wire of ckptd: protobuf messages and gRPC services, generated from the .proto files beside the modules."""
