// Calls reflection v1 with the protos of gRPC's own package for Node and prints the names of services.
// node reflection_v1.mjs HOST:PORT; from a folder whose node_modules has @grpc/reflection.
import { createRequire } from "node:module";
import path from "node:path";

const require = createRequire(`${process.cwd()}/`);
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const folder = path.join(path.dirname(require.resolve("@grpc/reflection/package.json")), "build/proto");
const definition = loader.loadSync("grpc/reflection/v1/reflection.proto", { includeDirs: [folder] });
const { ServerReflection } = grpc.loadPackageDefinition(definition).grpc.reflection.v1;
const client = new ServerReflection(process.argv[2], grpc.credentials.createInsecure());
const call = client.serverReflectionInfo();
call.write({ listServices: "" });
call.end();
for await (const response of call) {
  console.log(JSON.stringify(response.listServicesResponse.service.map((each) => each.name)));
}
client.close();
